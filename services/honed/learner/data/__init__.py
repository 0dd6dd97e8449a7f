"""What is learned from, checked at the door, and as tensors."""
