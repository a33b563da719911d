"""Pictures of a run's tables: a table and Axes in, Axes out.

Every mean is drawn with its 95 % interval, and how many it is of is written on the picture. matplotlib is imported when
a plot is made, not before, and never pyplot: no window, no global state; `ax.figure.savefig(...)` writes a file.
"""

from pluralprefs.plots.accuracy import cells as cells
from pluralprefs.plots.accuracy import shot_curve as shot_curve
from pluralprefs.plots.calibration import calibration as calibration
from pluralprefs.plots.profiles import heat_map as heat_map
from pluralprefs.plots.profiles import profile_dots as profile_dots
from pluralprefs.plots.profiles import radar as radar
from pluralprefs.plots.training import training_curves as training_curves
from pluralprefs.plots.users import profile_by_shots as profile_by_shots
from pluralprefs.plots.users import user_map as user_map
from pluralprefs.plots.users import user_profile as user_profile
from pluralprefs.plots.worst import worst_group_frontier as worst_group_frontier
from pluralprefs.plots.worst import wrong_user_gap as wrong_user_gap
