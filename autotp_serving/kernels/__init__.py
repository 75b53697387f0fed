"""Ways to compute what a model asks for, one folder for each kind of device. Every rank."""
