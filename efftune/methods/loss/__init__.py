"""What is learnt from: other losses, and a part of the batches."""
