"""The embedded default: a tiny checkpoint trained on text that every Python install carries."""
