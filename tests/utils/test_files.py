from edt.utils.files import differences


def test_differences_are_shown_where_they_are():
    names = [f"class {i}" for i in range(1000)]
    renamed = [*names[:7], "owl", *names[8:]]
    assert differences({"classes": names, "n": 1}, {"classes": names, "n": 1}) == ""
    assert differences({"classes": names}, {"classes": renamed}) == "classes[7]: class 7 -> owl"
    shorter = differences({"classes": names}, {"classes": names[:9]})
    assert shorter == "classes: 1000 values -> 9 values"
    assert differences({"classes": names}, {}) == "classes: 1000 values -> None"


def test_a_hash_decides_over_the_name_beside_it():
    old, moved = {"vae": "a", "vae_sha256": "1"}, {"vae": "b", "vae_sha256": "1"}
    assert differences(old, moved) == ""
    assert differences(old, {"vae": "a", "vae_sha256": "2"}) == "vae_sha256: 1 -> 2"
    assert differences(old, {"vae": "b", "vae_sha256": "2"}) == "vae: a -> b, vae_sha256: 1 -> 2"
    assert differences({"vae": "a", "vae_sha256": None}, {"vae": "b", "vae_sha256": None})
    assert differences({"vae": "a"}, {"vae": "b"}) == "vae: a -> b"
    nested = {"vae": {"id": "a", "sha256": "1"}}
    assert differences(nested, {"vae": {"id": "b", "sha256": "1"}}) == ""
    assert differences(nested, {"vae": {"id": "b", "sha256": "2"}})
    assert differences(nested, {"vae": {"id": "a", "sha256": "1", "shift_factor": 0.1}})
