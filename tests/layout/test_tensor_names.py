"""Names that differ only by what wraps modules."""

from wsync.layout.tensor_names import seen_through


def test_a_name_that_could_be_several_is_none_of_them() -> None:
    """Guards a tensor from the values of another one whose name differs only by a wrapper."""
    assert seen_through(["_orig_mod.a"], ["a"]) == {"_orig_mod.a": "a"}
    assert seen_through(["_orig_mod.a", "module.a"], ["a"]) == {}
    assert seen_through(["_orig_mod.a"], ["a", "module.a"]) == {}
    assert seen_through(["_orig_mod.a", "a"], ["a"]) == {}
