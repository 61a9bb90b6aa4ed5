"""VSPW, Cityscapes and KITTI by the published protocol (method section 3)."""
