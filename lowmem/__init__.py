"""The techniques of finetune_lowmem.py, one a file, and `lowmem.training`, what any run needs.

Read finetune_lowmem.py first, then linear_cross_entropy.py and adafactor.py; a model larger than the card: streaming.py
and placement.py; what keeps a GPU busy: cuda_graphs.py; a user's own rows: data/.

The import rule, which tests/test_imports.py holds: arrows point down.

    finetune_base.py, finetune_lowmem.py > common.py > lowmem.data.* > lowmem.training.*
                                         > lowmem.* > lowmem.training.*

Nothing here knows HellaSwag: neither the techniques nor `training` import common.py. `training` imports no technique,
`data` neither techniques nor models.
finetune_base.py imports `training` and Adafactor alone. Modules are imported, not their functions, but for a few names.
"""
