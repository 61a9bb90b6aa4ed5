"""Table D: DINO-Foresight's own protocol on Cityscapes (docs/foresight.md)."""
