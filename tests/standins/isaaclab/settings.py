"""Settings that refuse names which the real classes do not have."""

MISSING = object()


class Settings:
    """`FIELDS`: {name: default}; MISSING has to be given."""

    FIELDS = {}  # noqa: RUF012

    def __init__(self, **given):
        unknown = set(given) - set(self.FIELDS)
        if unknown:
            raise TypeError(f"{type(self).__name__} has no fields {sorted(unknown)}")
        for name, default in self.FIELDS.items():
            value = given.get(name, default)
            if value is MISSING:
                raise TypeError(f"{type(self).__name__} needs {name}")
            setattr(self, name, value)
