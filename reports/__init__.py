"""What people read of a run: scores, tables, pictures, TensorBoard files."""
