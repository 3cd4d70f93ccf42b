"""Grammars of answers: JSON schemas, regular expressions and grammars, compiled to masks of the tokens that may come next."""
