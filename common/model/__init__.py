"""Qwen3-VL as this project trains it."""
