"""The command line `arbs`."""
