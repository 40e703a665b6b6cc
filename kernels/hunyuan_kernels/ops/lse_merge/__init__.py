"""Attention over further keys merged into a running output."""
