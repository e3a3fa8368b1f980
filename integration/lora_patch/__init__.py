"""Serve LoRA adapters from ai_advisor_service.py; shared with training and evaluation. Copied as a folder."""
