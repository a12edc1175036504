"""What any run needs, the baseline's too; each file imports only those before it:

errors, parallel, memory: what fails, who computes, how many bytes. batches, layouts, data: sequences, how they make
batches, in which order. heads, source, tokenizing, weights, models: a causal LM, from its files to its losses. fsdp:
its shards on several GPUs. checkpoint, saved_model, records: what is on the disk. attention, evaluation, dry_run: rows
that stand in one line; scores; what a run would take. signals, run: a run from its first step to its last. demo,
arguments, command: a script as a command.
"""
