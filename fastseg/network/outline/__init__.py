"""Outlines at the photo's own size: upsampling of logits, and their refinement by the photo."""
