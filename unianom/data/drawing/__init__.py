"""A small drawn corpus of industrial inspection pictures, in the MVTec AD folder layout.

Four categories: two textures (`weave`, `grain`), one object on plain ground (`cog`) and one on cluttered ground
(`cap`), each with natural variation among its normal pictures and three types of defect with exact masks. It needs
no download and is the same on every run, so that demonstrations and tests can work offline.

A picture is drawn at twice its size and reduced, in this order: the clean scene, the scene as the defect alters it,
the two blended by the coverage of the defect, then light, colour cast and sensor noise. Every random choice comes
from a generator seeded by (seed, category, index) for the scene and (…, defect) for the defect, so a picture does
not depend on how many others are drawn, in which order, or by which process.
"""

from unianom.data.drawing.corpus import draw_corpus, draw_sample
from unianom.data.drawing.scenes import DEFECTS

__all__ = ["DEFECTS", "draw_corpus", "draw_sample"]
