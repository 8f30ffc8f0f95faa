"""The families of networks: what their stages are made of. The table that names them is in model.py."""
