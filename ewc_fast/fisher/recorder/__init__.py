"""Records per-sample gradients, squared, by watching a model's autograd graph.

trial      makes a plan on a few samples and holds it to single samples
watch      what the graph does not tell about the forward pass
recurrent  recurrent layers, for which the graph tells little unless they are run otherwise
graph      the graph as a list
layouts    which sample each entry of a gradient belongs to
stems      what lies between an operand and its parameters
plan       the uses of each parameter, and the way their squares are taken
recorder   the backward passes over a batch, by a plan
tracing    layouts that must be looked up in each batch
rules      what each kind of operation says of its operands' gradients
per_sample the forms such gradients come in, and their squares
"""
