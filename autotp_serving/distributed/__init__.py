"""The ranks as a group: launch, channel, collectives, placement. Every rank."""
