"""Text.

corpora      a text by name: a file, one of the hub's usual corpora, or what every Python carries
python_docs  the documentation and docstrings of the standard library, the text that needs no download
tokenize     a text of any length as tokens, in parallel
tokens       the tokens of texts by name, kept where they took long
calibration  windows of tokens that statistics and training are made from
"""
