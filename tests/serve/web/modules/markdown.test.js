import assert from "node:assert/strict";
import test from "node:test";
import { parseInline, safeAddress } from "../../../../moesaic/serve/web/inline.js";
import { firstUnsettled, parse } from "../../../../moesaic/serve/web/markdown.js";

/** Short form of a tree: nested lists of names and texts. */
const spans = (list) =>
  list.map((span) => {
    if (span.type === "text") return span.text;
    if (span.type === "break") return "\n";
    if (span.type === "code") return ["code", span.text];
    if (span.type === "image") return ["image", span.href, span.alt];
    return [span.type, ...(span.type === "link" ? [span.href] : []), ...spans(span.children)];
  });
const block = (one) => {
  switch (one.type) {
    case "paragraph":
      return ["p", ...spans(one.spans)];
    case "heading":
      return [`h${one.level}`, ...spans(one.spans)];
    case "code":
      return ["pre", one.language, one.text];
    case "quote":
      return ["quote", ...one.blocks.map(block)];
    case "list":
      return [(one.ordered ? `ol${one.start}` : "ul") + (one.loose ? " loose" : ""), ...one.items.map((item) => item.map(block))];
    case "table":
      return ["table", one.align, one.head.map(spans), ...one.rows.map((row) => row.map(spans))];
    default:
      return [one.type];
  }
};
const tree = (source) => parse(source).map((entry) => block(entry.block));
const inline = (source) => spans(parseInline(source));

test("spans", () => {
  const cases = [
    ["plain", ["plain"]],
    ["a **b** c", ["a ", ["strong", "b"], " c"]],
    ["*a **b** c*", [["emphasis", "a ", ["strong", "b"], " c"]]],
    ["***both***", [["emphasis", ["strong", "both"]]]],
    ["~~gone~~ ~not~", [["strike", "gone"], " ~not~"]],
    ["snake_case_name and _this_", ["snake_case_name and ", ["emphasis", "this"]]],
    ["f(*args, **kwargs)", ["f(*args, **kwargs)"]],
    ["2 * 3 * 4", ["2 * 3 * 4"]],
    ["**open", ["**open"]],
    ["`a*b*` and ``x`y``", [["code", "a*b*"], " and ", ["code", "x`y"]]],
    ["`open", ["`open"]],
    ["\\*not\\* a\\b", ["*not* a\\b"]],
    ["one\ntwo", ["one", "\n", "two"]],
    ["a<br>b<br/>c", ["a", "\n", "b", "\n", "c"]],
    ["&lt;b&gt; &amp;lt; &copy;", ["<b> &lt; &copy;"]],
    ["**粗体**字", [["strong", "粗体"], "字"]],
  ];
  for (const [source, expected] of cases) assert.deepEqual(inline(source), expected, source);
});

test("links", () => {
  const cases = [
    ["[a](https://x.org/b_(c))", [["link", "https://x.org/b_(c)", "a"]]],
    ['[a](https://x.org "title") [b](<https://x.org/y>)', [["link", "https://x.org/", "a"], " ", ["link", "https://x.org/y", "b"]]],
    ["[**a** `b`](mailto:a@x.org)", [["link", "mailto:a@x.org", ["strong", "a"], " ", ["code", "b"]]]],
    ["see https://x.org/a?b=c. Or (https://x.org)", ["see ", ["link", "https://x.org/a?b=c", "https://x.org/a?b=c"], ". Or (", ["link", "https://x.org/", "https://x.org"], ")"]],
    ["看https://x.org。好", ["看", ["link", "https://x.org/", "https://x.org"], "。好"]],
    ["<https://x.org>", [["link", "https://x.org/", "https://x.org"]]],
    ["[https://x.org](https://y.org)", [["link", "https://y.org/", "https://x.org"]]],
    ["![cat](https://x.org/c.png)", [["image", "https://x.org/c.png", "cat"]]],
    ["[1] and [x] (y)", ["[1] and [x] (y)"]],
  ];
  for (const [source, expected] of cases) assert.deepEqual(inline(source), expected, source);
});

test("only URLs with a safe scheme become links", () => {
  const refused = [
    "javascript:alert(1)",
    "JAVASCRIPT:alert(1)",
    " javascript:alert(1)",
    "java\tscript:alert(1)",
    "\x01javascript:alert(1)",
    "javascript&colon;alert(1)",
    "data:text/html,x",
    "vbscript:x",
    "file:///etc/passwd",
    "blob:https://x.org/1",
    "filesystem:https://x.org/1",
    "//x.org",
    "/path",
    "#a",
    "",
    "x",
    "https://",
  ];
  for (const address of refused) {
    assert.equal(safeAddress(address), null, address);
    const parsed = parseInline(`[a](${address}) [a](<${address}>) <${address}> ![a](${address})`);
    const hrefs = parsed.flatMap((span) => (span.type === "link" || span.type === "image" ? [span.href] : []));
    assert.ok(hrefs.every((href) => href === null || href.startsWith("https://x.org")), address);
  }
  assert.equal(safeAddress("HTTPS://X.org"), "https://x.org/");
});

test("html is text", () => {
  const source = '<script>alert(1)</script><img src=x onerror="y"></textarea><!-- c -->';
  assert.deepEqual(tree(source), [["p", source]]);
});

test("blocks", () => {
  const cases = [
    ["# A\n## B ##\n####### C", [["h1", "A"], ["h2", "B"], ["p", "####### C"]]],
    ["#hashtag", [["p", "#hashtag"]]],
    ["a\n\nb\nc", [["p", "a"], ["p", "b", "\n", "c"]]],
    ["***\n- - -\n___", [["rule"], ["rule"], ["rule"]]],
    ["text\n---", [["p", "text"], ["rule"]]],
    ["```js\nlet a = 1;\n\n# no\n```\nafter", [["pre", "js", "let a = 1;\n\n# no"], ["p", "after"]]],
    ["~~~~\n```\n~~~\n~~~~", [["pre", "", "```\n~~~"]]],
    ["```py\nunfinished", [["pre", "py", "unfinished"]]],
    ["```inline```", [["p", ["code", "inline"]]]],
    ["> a\n> b\n>\n> - c\n\nd", [["quote", ["p", "a", "\n", "b"], ["ul", [["p", "c"]]]], ["p", "d"]]],
    ["a\r\nb\r\n\r\nc", [["p", "a", "\n", "b"], ["p", "c"]]],
  ];
  for (const [source, expected] of cases) assert.deepEqual(tree(source), expected, source);
});

test("lists", () => {
  const p = (text) => ["p", text];
  const cases = [
    ["- a\n- b", [["ul", [p("a")], [p("b")]]]],
    ["* a\n+ b", [["ul", [p("a")]], ["ul", [p("b")]]]],
    ["3. a\n4. b", [["ol3", [p("a")], [p("b")]]]],
    ["1) a\n2) b", [["ol1", [p("a")], [p("b")]]]],
    ["- a\n  - b\n    - c\n- d", [["ul", [p("a"), ["ul", [p("b"), ["ul", [p("c")]]]]], [p("d")]]]],
    ["1. a\n  - b\n2. c", [["ol1", [p("a"), ["ul", [p("b")]]], [p("c")]]]],
    ["- a\n\n- b", [["ul loose", [p("a")], [p("b")]]]],
    ["- a\n\n  more\n- b", [["ul loose", [p("a"), p("more")], [p("b")]]]],
    ["- a\n  - b\n\n  - c\n- d", [["ul", [p("a"), ["ul loose", [p("b")], [p("c")]]], [p("d")]]]],
    ["- a\n\nb", [["ul", [p("a")]], ["p", "b"]]],
    ["- a\nlazy\n- b", [["ul", [["p", "a", "\n", "lazy"]], [p("b")]]]],
    ["1. a\n   ```\n   x\n     y\n   ```\n2. b", [["ol1", [p("a"), ["pre", "", "x\n  y"]], [p("b")]]]],
    ["a\n- b", [p("a"), ["ul", [p("b")]]]],
    ["in\n1984. Orwell", [["p", "in", "\n", "1984. Orwell"]]],
    ["-5 and -a", [p("-5 and -a")]],
  ];
  for (const [source, expected] of cases) assert.deepEqual(tree(source), expected, source);
});

test("tables", () => {
  const cases = [
    ["| a | b |\n|:-:|--:|\n| 1 | **2** |", [["table", ["center", "right"], [["a"], ["b"]], [["1"], [["strong", "2"]]]]]],
    ["a | b\n-|-\n1", [["table", [null, null], [["a"], ["b"]], [["1"]]]]],
    ["so:\n| a |\n|---|\n| x\\|y | surplus |\n\nend", [["p", "so:"], ["table", [null], [["a"]], [["x|y"]]], ["p", "end"]]],
    ["| a | b |\n|---|", [["p", "| a | b |", "\n", "|---|"]]],
  ];
  for (const [source, expected] of cases) assert.deepEqual(tree(source), expected, source);
});

test("settled blocks do not change when text is added", () => {
  const source =
    "# T\n\nText *a*\nb\n\n- x\n  - y\n\n  z\n\n1. one\n\n2. two\n\n| a | b |\n|--|--|\n| 1 | 2 |\n\n> q\n> r\n\n```js\n- no\n\n# no\n```\nend\n***\nlast";
  const whole = parse(source);
  for (let length = 1; length <= source.length; length += 1) {
    const part = source.slice(0, length);
    const blocks = parse(part);
    const settled = firstUnsettled(part, blocks);
    assert.deepEqual(blocks.slice(0, settled), whole.slice(0, settled), JSON.stringify(part));
  }
});

test("hostile input neither overflows nor hangs", () => {
  const units = [
    "*", "**a ", "*a ", "_a*", "[", "![", "[a](", "](http://a)", "[a](http://b) ", "`", "`a``b```c", ">", "> a\n\n", "- ", "- a\n", "1. ",
    "#", " ", "|", "|-", "<", "<http://", "<br", "&amp", "~~a", "\\", "https://a.b ", "```\n", "a\n-|-\n", "  - a\n", "\t", "\u2028",
  ]; // prettier-ignore
  for (const unit of units) {
    // Quadratic time would take minutes, and JSON.stringify overflows on deep trees.
    for (const tail of ["", "x", "`", ")"]) assert.ok(JSON.stringify(parse(unit.repeat(20_000) + tail)));
  }
});

test("nesting is bounded", () => {
  const depthOf = (value) => (value && typeof value === "object" ? 1 + Math.max(0, ...Object.values(value).map(depthOf)) : 0);
  for (const unit of ["> ", "- ", "1. ", "> - ", "**a *b ", "~~a **b "]) {
    const closed = unit.repeat(3000) + "x" + "* ** ~~".repeat(3000);
    assert.ok(depthOf(parse(closed)) < 200, unit);
  }
});
