"""A trained run as a file that other programs run: preprocessing inside, checked against our own answers."""
