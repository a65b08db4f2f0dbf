"""What Triton's interpreter needs to run with the numpy at hand."""

import importlib.metadata


def mend() -> None:
    """Until 3.8 the interpreter counts `range(0, K)` by int() of an array of one element, which numpy refuses since
    2.4. The same number is read with item()."""
    if [int(part) for part in importlib.metadata.version("triton").split(".")[:2]] >= [3, 8]:
        return
    from triton.runtime import interpreter

    patch = interpreter._patch_lang_tensor

    def patched(tensor, scope):
        patch(tensor, scope)
        scope.set_attr(tensor, "__index__", lambda self: self.handle.data.item())

    interpreter._patch_lang_tensor = patched
