"""What the command line refuses that click does not."""

import click


class Strict(click.Command):
    """A command that refuses an option which takes one value and is given several times; click takes the last."""

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        """Parse the arguments, after a look at how often each option is among them."""
        _, _, given = self.make_parser(ctx).parse_args(args=list(args))
        for option in self.params:
            one = isinstance(option, click.Option) and not (option.multiple or option.is_flag or option.count)
            if one and given.count(option) > 1:
                raise click.UsageError(f"{option.opts[0]} is given {given.count(option)} times; give it once.", ctx)
        return super().parse_args(ctx, args)
