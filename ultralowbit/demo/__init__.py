"""`ultralowbit demo`, and the tiny checkpoint it compresses, which comes with the package.

run         the demo: several recipes, one table
train       how the checkpoint was made, from text that every Python install carries
checkpoint  the model and its tokenizer
"""
