from mapet.data.seeds import Draws, Stream, fold_seed


def test_seeds_do_not_collide() -> None:
    seeds = {fold_seed(a, s, b, c) for a in range(9) for s in Stream for b in range(-1, 20) for c in range(50)}
    assert len(seeds) == 9 * len(Stream) * 21 * 50
    assert all(0 <= seed < 2**63 for seed in seeds)


def test_every_epoch_and_image_has_a_new_view() -> None:
    draws = Draws(1, 2)
    assert draws.draw(0, "a").geometry != draws.draw(0, "b").geometry
    assert draws.draw(0, "caf\udce9.png").geometry == draws.draw(0, "caf\udce9.png").geometry
    assert [draws.number(epoch, "a") for epoch in range(3)] == [0, 1, 2]
    assert len({draws.draw(epoch, "a").geometry for epoch in range(50)}) == 50


def test_a_fixed_number_of_views_is_shown_in_turn() -> None:
    draws = Draws(1, 2, crops=3, mirror=True)
    shown = [draws.number(epoch, "a") for epoch in range(12)]
    assert sorted(shown[:6]) == list(range(6))
    assert shown[6:] == shown[:6]
    first = {draws.number(0, str(name)) for name in range(100)}
    assert first == set(range(6)), "not all images start with the same view"


def test_mirrored_views_are_pairs_of_one_crop() -> None:
    draws = Draws(1, 2, crops=2, mirror=True)
    found = [draws.draw(number, "a") for number in range(4)]
    assert [draw.mirrored for draw in found] == [False, True, False, True]
    assert found[0].geometry == found[1].geometry != found[2].geometry == found[3].geometry
    assert Draws(1, 2, crops=2).draw(0, "a").mirrored is None


def test_colours_change_with_the_epoch_and_crops_do_not() -> None:
    draws = Draws(1, 2, crops=1)
    first, later = draws.draw(0, "a", epoch=0), draws.draw(0, "a", epoch=5)
    assert first.geometry == later.geometry
    assert first.colour != later.colour
    assert Draws(1, 3, crops=1).draw(0, "a").colour != first.colour
    assert Draws(1, 3, crops=1).draw(0, "a").geometry == first.geometry
