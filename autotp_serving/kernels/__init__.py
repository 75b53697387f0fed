"""Ways to compute a layer on one kind of device, each with its portable reference. Every rank."""
