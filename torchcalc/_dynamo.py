"""Makes Functions known to torch.compile. Imported by Dynamo itself, when it first traces a call of one.

``allow_in_graph`` imports Dynamo, which takes a second, so it cannot stand at the definition of each Function. But
Dynamo executes an import statement that it meets while tracing. The one in ``Function.apply`` runs this module at
that moment, just before Dynamo looks at the callable; Functions defined later register themselves.
"""

import torch

from torchcalc import autograd

while autograd._not_yet_in_graph:
    torch.compiler.allow_in_graph(autograd._not_yet_in_graph.pop())
