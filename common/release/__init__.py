"""Versions of an adapter: in use, promoted, rolled back."""
