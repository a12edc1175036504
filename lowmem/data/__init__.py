"""Own data: rows of a user's data set to sequences of tokens, of which some are trained. common.py imports it.

files: the rows of a data set, one after the other. tokens: texts to token ids, and which token holds a character.
documents, chat: texts, and conversations under a model's chat template, to sequences. formats: what a row is, by its
columns. facts: what the reader should know about the data. own: all of it, as the data of a run.

Nothing here knows the engine: of `lowmem` only `lowmem.training.{batches,data,errors,source,tokenizing}` is imported.
"""
