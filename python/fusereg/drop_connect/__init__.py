"""DropConnect: layers with dropout of their weights."""
