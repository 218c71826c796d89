"""DropBlock: dropout of contiguous regions of feature maps."""
