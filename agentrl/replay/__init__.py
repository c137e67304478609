"""True replay: what was recorded is done again, compared, judged anew, or gone on with from a turn.

Call it: `agentrl.replay("runs/quickstart")`. Turns and calls are counted from 0, as in the record.
"""

from agentrl.verb import make_callable

make_callable(__name__)
