from edt.utils.files import differences


def test_differences_are_shown_where_they_are():
    names = [f"class {i}" for i in range(1000)]
    renamed = [*names[:7], "owl", *names[8:]]
    assert differences({"classes": names, "n": 1}, {"classes": names, "n": 1}) == ""
    assert differences({"classes": names}, {"classes": renamed}) == "classes[7]: class 7 -> owl"
    shorter = differences({"classes": names}, {"classes": names[:9]})
    assert shorter == "classes: 1000 values -> 9 values"
    assert differences({"classes": names}, {}) == "classes: 1000 values -> None"
