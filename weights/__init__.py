"""Weight files -> arrays under this project's names -> the variables of a network."""
