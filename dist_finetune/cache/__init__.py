"""The frozen prefix computed once: activations at the cut are stored, and only what lies above trains from them.

`cut` finds where a model can be cut and makes the tail, `store` is the files, `build` fills them, `rows` feeds them.
"""
