"""Names near to one that was not found, over all the places models come from."""

from dist_finetune.errors import nearest

DEMO_MODELS = ("demo:efficientnet-lite0", "demo:minilm")
WAYS = "Write a hub id, a local folder, timm:NAME, torchvision:NAME, demo:NAME or module:function."


def suggestions(name: str, otherwise: str = WAYS) -> str:
    """A sentence with the nearest demo, timm and torchvision models; `otherwise` where none is near."""
    # Loading timm takes a second, and only an error needs its list.
    import timm
    import torchvision

    valid = [*DEMO_MODELS, *(f"timm:{n}" for n in timm.list_models())]
    valid += [f"torchvision:{n}" for n in torchvision.models.list_models(module=torchvision.models)]
    bare = name.rpartition(":")[2].rpartition("/")[2]
    exact = [v for v in valid if v.partition(":")[2] == bare]
    close = exact or nearest(name, valid) or nearest(bare, [v.partition(":")[2] for v in valid])
    named = [v for c in close for v in valid if c in (v, v.partition(":")[2])][:4]
    if named:
        return f"Did you mean {' or '.join(dict.fromkeys(named))}?"
    return otherwise
