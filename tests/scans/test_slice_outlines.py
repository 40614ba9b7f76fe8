import numpy as np
from matplotlib.figure import Figure

from fullscale.scans.slice_outlines import OutlineStyle, draw_outlined_slice

IMAGE = np.linspace(-200, 300, 200).reshape(10, 20)


def draw(*outlines, **settings):
    axes = Figure().subplots()
    draw_outlined_slice(axes, IMAGE, outlines, (-160, 240), **settings)
    return axes


def square():
    mask = np.zeros(IMAGE.shape, dtype=bool)
    mask[2:8, 2:8] = True
    return mask


def test_image_has_the_window_and_the_aspect():
    axes = draw(aspect=2.0)
    (image,) = axes.images
    assert image.get_clim() == (-160, 240)
    assert axes.get_aspect() == 2.0


def test_outline_has_its_style_and_runs_along_the_mask():
    axes = draw((square(), OutlineStyle("#ff0000", "dashed", 1.5, halo_width=1.0)))
    (contour,) = axes.collections
    assert contour.get_linewidth() == [1.5]
    assert contour.get_linestyle()[0][1] is not None
    assert contour.get_path_effects()
    (path,) = contour.get_paths()
    assert (path.vertices.min(), path.vertices.max()) == (1.5, 7.5)


def test_empty_mask_has_no_outline_and_a_plain_one_no_border():
    empty = np.zeros(IMAGE.shape, dtype=bool)
    axes = draw((empty, OutlineStyle("#ff0000")), (square(), OutlineStyle("#00ff00")))
    (contour,) = axes.collections
    assert not contour.get_path_effects()
