"""Layers and models of a user's own, that make their attention in every way there is."""

import keras

register = keras.saving.register_keras_serializable("tests")
ATTENTION = {"num_heads": 2, "key_dim": 3}


@register
class InConstructor(keras.layers.Layer):
    """No `build`, and no `get_config`: Keras finds out both by itself."""

    def __init__(self, units, **kwargs):
        super().__init__(**kwargs)
        self.attention = keras.layers.MultiHeadAttention(num_heads=2, key_dim=3)
        self.dense = keras.layers.Dense(units)

    def call(self, x, training=None):
        return self.dense(self.attention(x, x, use_causal_mask=True, training=training))


@register
class InBuild(keras.layers.Layer):
    def __init__(self, units, **kwargs):
        super().__init__(**kwargs)
        self.units = units

    def build(self, shape):
        self.attention = keras.layers.GroupQueryAttention(5, 4, 2, name="grouped")
        self.attention.build(shape, shape)
        self.norm = keras.layers.LayerNormalization()
        self.norm.build(shape)
        self.scale = self.add_weight(shape=(self.units,), initializer="ones", name="scale")

    def call(self, x):
        return self.norm(self.attention(x, x)) * self.scale

    def compute_output_shape(self, shape):
        return shape

    def get_config(self):
        return {**super().get_config(), "units": self.units}


@register
class InContainers(keras.layers.Layer):
    def __init__(self, depth=1, **kwargs):
        super().__init__(**kwargs)
        self.depth = depth
        self.stack = []
        for _ in range(depth):
            self.stack.append(keras.layers.MultiHeadAttention(2, 3))
        self.named = {"last": keras.layers.MultiHeadAttention(1, 4), "dense": InConstructor(6)}

    def call(self, x):
        for attention in self.stack:
            x = x + attention(x, x)
        return self.named["dense"](self.named["last"](x, x))

    def get_config(self):
        return {**super().get_config(), "depth": self.depth}


@register
class Lazy(keras.layers.Layer):
    """Its attention is not there before it has been called: it has no `build`."""

    def __init__(self, **kwargs):
        super().__init__(**kwargs)
        self.inner = InBuild(6)

    def call(self, x):
        return self.inner(x)


@register
class Around(keras.layers.Wrapper):
    def call(self, x):
        return x + self.layer(x)


@register
class Given(keras.layers.Layer):
    """Is given its attention, which is in its configuration."""

    def __init__(self, attention, **kwargs):
        super().__init__(**kwargs)
        self.attention = attention

    def call(self, x):
        return self.attention(x, x)

    def get_config(self):
        config = keras.saving.serialize_keras_object(self.attention)
        return {**super().get_config(), "attention": config}

    @classmethod
    def from_config(cls, config):
        attention = keras.saving.deserialize_keras_object(config.pop("attention"))
        return cls(attention, **config)


@register
class Own(keras.Model):
    """A subclassed model without `build`, and with more than weights to it."""

    def __init__(self, units=6, **kwargs):
        super().__init__(**kwargs)
        self.units = units
        self.blocks = []
        for block in (InBuild(6), InConstructor(units)):
            self.blocks.append(block)

    def call(self, x):
        for block in self.blocks:
            x = block(x)
        return x

    def who(self):
        return f"Own({self.units})"

    def get_config(self):
        return {**super().get_config(), "units": self.units}


@register
class Graph(keras.Model):
    """A functional model of a class with a training step of its own."""

    def train_step(self, *args, **kwargs):
        return super().train_step(*args, **kwargs)


class Becomes(InBuild):
    """Its configuration makes another class."""

    @classmethod
    def from_config(cls, config):
        return InBuild(**config)


class Unregistered(InBuild):
    """Is found in files with the help of `custom_objects` only."""


@register
class Embedded(keras.layers.Layer):
    """Has the configuration of the layer that it holds, but not its class, in its own."""

    def __init__(self, inner=None, **kwargs):
        super().__init__(**kwargs)
        self.inner = InBuild(6) if inner is None else InBuild.from_config(inner)

    def call(self, x):
        return self.inner(x)

    def get_config(self):
        return {**super().get_config(), "inner": self.inner.get_config()}


@register
class EmbeddedAttention(keras.layers.Layer):
    """The same with attention, whose configuration changes when it is converted."""

    def __init__(self, inner=None, **kwargs):
        super().__init__(**kwargs)
        self.inner = keras.layers.MultiHeadAttention.from_config(inner or ATTENTION)

    def call(self, x):
        return self.inner(x, x)

    def get_config(self):
        return {**super().get_config(), "inner": self.inner.get_config()}


@register
class FloatMask(keras.layers.Layer):
    def __init__(self, **kwargs):
        super().__init__(**kwargs)
        self.attention = keras.layers.MultiHeadAttention(2, 3)

    def call(self, x):
        mask = keras.ops.tril(keras.ops.ones((1, x.shape[1], x.shape[1])))
        return self.attention(x, x, attention_mask=mask)


class TwoArguments(keras.Model):
    """Keras records the shape of the first argument only, and cannot build it from that."""

    def __init__(self, **kwargs):
        super().__init__(**kwargs)
        self.attention = keras.layers.MultiHeadAttention(2, 3, name="attention")

    def call(self, query, value):
        return self.attention(query, value)


class Secret(keras.layers.Layer):
    """Cannot be made again: its configuration lacks the layer that it is given."""

    def __init__(self, attention, **kwargs):
        super().__init__(**kwargs)
        self.attention = attention

    def call(self, x):
        return self.attention(x, x)


class Subclass(keras.layers.MultiHeadAttention):
    """May do anything."""
