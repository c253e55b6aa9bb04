"""Codecs for tensors on a link."""
