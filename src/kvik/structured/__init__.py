"""Texts that have to follow a schema, a regular expression or a grammar: which tokens may come next."""
