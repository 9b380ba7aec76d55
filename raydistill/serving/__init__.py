"""Answers of a finished model: over files (`predict`) and over HTTP (`serve`)."""
