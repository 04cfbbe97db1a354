"""Training loops written by hand, one for each backend."""

from __future__ import annotations

from tests.adapters.library import BACKEND, keras


def steps(model, x, y, *, training, compiled):
    """Yield after each step of gradient descent on the batch: the loss, and what `watch.step` needs besides.

    Args:
        model: a built model.
        x: inputs.
        y: class indices.
        training: the flag that the model is called with; None calls it without.
        compiled: whether the step is compiled.
    """
    mode = {} if training is None else {"training": training}
    yield from {"tensorflow": _tensorflow, "jax": _jax, "torch": _torch}[BACKEND](model, x, y, mode, compiled)


def _loss(scores, y):
    return keras.losses.SparseCategoricalCrossentropy(from_logits=True)(y, scores)


def _tensorflow(model, x, y, mode, compiled):
    import tensorflow as tf

    optimizer = keras.optimizers.SGD(0.1)
    optimizer.build(model.trainable_variables)

    def step(x, y):
        with tf.GradientTape() as tape:
            loss = _loss(model(x, **mode), y)
        pairs = zip(tape.gradient(loss, model.trainable_variables), model.trainable_variables, strict=True)
        optimizer.apply_gradients([(gradient, variable) for gradient, variable in pairs if gradient is not None])
        return loss

    run = tf.function(step) if compiled else step
    x, y = tf.constant(x), tf.constant(y)
    while True:
        yield run(x, y), {}


def _jax(model, x, y, mode, compiled):
    import jax

    trainable = [v.value for v in model.trainable_variables]
    fixed = [v.value for v in model.non_trainable_variables]

    def loss_of(trainable, fixed, x, y):
        scores, fixed = model.stateless_call(trainable, fixed, x, **mode)
        return _loss(scores, y), fixed

    def step(trainable, fixed, x, y):
        (loss, fixed), gradients = jax.value_and_grad(loss_of, has_aux=True)(trainable, fixed, x, y)
        return loss, [v - 0.1 * g for v, g in zip(trainable, gradients, strict=True)], fixed

    run = jax.jit(step) if compiled else step
    while True:
        loss, trainable, fixed = run(trainable, fixed, x, y)
        yield loss, {"state": (trainable, fixed)}


def _torch(model, x, y, mode, compiled):
    import torch  # which compiles nothing here: it takes more than a minute a net

    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    x, y = torch.as_tensor(x), torch.as_tensor(y)
    while True:
        optimizer.zero_grad()
        loss = _loss(model(x, **mode), y)
        loss.backward()
        optimizer.step()
        yield loss.detach(), {}
