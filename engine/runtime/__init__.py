"""Answering: from images and questions to answers."""
