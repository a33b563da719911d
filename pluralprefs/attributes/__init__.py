"""Latent attributes of texts: which there are, and how far a text expresses each of them.

`catalog` names the nineteen attributes with their poles and levels, and reads a user's own set.
"""
