"""Faces in photos: alignment and crops, detection, quality, landmarks, drawing."""
