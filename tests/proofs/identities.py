"""A second opinion on the rewriting rules of the scripts: that they are identities, by sympy.

Gappa checks the rules that it is given by itself, and check.py --coq has Coq prove them.
"""

import ast
import re

import sympy


def wrong_rules(script: str) -> list[str]:
    """Those rules `a -> b` of a script whose two sides differ, with its definitions put in.

    Results of roundings and roots are symbols of their own: nothing is known of them.
    """
    script = re.sub(r"#.*", "", script)
    before, _, after = script.partition("{")
    definitions: dict[str, ast.expr] = {}
    for statement in before.split(";"):
        if "=" in statement and not statement.strip().startswith("@"):
            name, _, expression = statement.partition("=")
            definitions[name.strip()] = _parsed(expression)

    def value(node: ast.expr) -> sympy.Expr:
        match node:
            case ast.Name(name):
                return value(definitions[name]) if name in definitions else sympy.Symbol(name)
            case ast.Constant(int(number)):
                return sympy.Integer(number)
            case ast.Call():
                return sympy.Symbol(ast.unparse(node))
            case ast.UnaryOp(ast.USub(), operand):
                return -value(operand)
            case ast.BinOp(left, ast.Add(), right):
                return value(left) + value(right)
            case ast.BinOp(left, ast.Sub(), right):
                return value(left) - value(right)
            case ast.BinOp(left, ast.Mult(), right):
                return value(left) * value(right)
            case ast.BinOp(left, ast.Div(), right):
                return value(left) / value(right)
        raise ValueError(f"cannot read {ast.unparse(node)}")

    wrong = []
    for rule in rules(after):
        left, _, right = rule.partition("->")
        if sympy.cancel(value(_parsed(left)) - value(_parsed(right))) != 0:
            wrong.append(rule)
    return wrong


def rules(after: str) -> list[str]:
    """What follows the proposition, without the conditions of rules and without hints."""
    statements = re.sub(r"\{[^}]*\}", "", after.partition("}")[2]).split(";")
    return [" ".join(s.split()) for s in statements if "->" in s]


def _parsed(expression: str) -> ast.expr:
    return ast.parse(" ".join(expression.split()), mode="eval").body
