"""Bytes to clips: shards, plan, decoding, clips, transforms, loader. Knows no tokens, masks or models."""
