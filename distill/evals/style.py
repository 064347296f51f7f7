"""The page's style sheet: light and dark by the reader's own setting, colours told apart by the colour-blind too."""

STYLE = """
:root { color-scheme: light dark;
  --bg: #fbfbfa; --card: #ffffff; --ink: #1d2129; --soft: #616975; --line: #e3e5e8; --band: #f5f6f7;
  --good: #177245; --bad: #b3261e; --warn: #8a5a00;
  --s0: #1d2129; --s1: #98a0ab; --s2: #2563c9; --s3: #d9730d; --s4: #1f8f5f; --s5: #8250c4;
  --s6: #c0397a; --s7: #0e8a93; --s8: #a8874f; }
@media (prefers-color-scheme: dark) { :root {
  --bg: #13151a; --card: #1b1e25; --ink: #e7e9ee; --soft: #9aa3b2; --line: #2e333d; --band: #21252d;
  --good: #58c98e; --bad: #ff8a80; --warn: #e5b567;
  --s0: #eef0f4; --s1: #77808e; --s2: #6ea8fe; --s3: #ff9f43; --s4: #4cc38a; --s5: #b794f6;
  --s6: #f480bb; --s7: #3cc7d1; --s8: #b99a63; } }
* { box-sizing: border-box; }
body { margin: 0; background: var(--bg); color: var(--ink); 
  font: 15px/1.5 system-ui, "Segoe UI", Roboto, Helvetica, Arial, sans-serif; font-variant-numeric: tabular-nums; }
main { max-width: 1120px; margin: 0 auto; padding: 36px 24px 64px; }
h1 { font-size: 27px; line-height: 1.25; margin: 0 0 6px; letter-spacing: -0.01em; text-wrap: balance; }
h2 { font-size: 19px; margin: 46px 0 4px; letter-spacing: -0.005em; }
h3 { font-size: 14px; margin: 18px 0 4px; color: var(--soft); font-weight: 600; }
p { margin: 4px 0 10px; max-width: 78ch; }
a { color: inherit; }
.soft, figcaption, .foot { color: var(--soft); }
.foot { font-size: 13px; }
nav { margin: 14px 0 0; font-size: 13px; color: var(--soft); display: flex; flex-wrap: wrap; gap: 4px 14px; }
nav a { text-decoration: none; border-bottom: 1px solid var(--line); }
.cards { display: grid; grid-template-columns: repeat(auto-fit, minmax(210px, 1fr)); gap: 14px; margin: 24px 0 8px; }
.card, .panel { background: var(--card); border: 1px solid var(--line); border-radius: 10px; }
.card { padding: 14px 18px 12px; }
.card .what { font-size: 13px; color: var(--soft); }
.card .big { font-size: 29px; font-weight: 650; line-height: 1.25; letter-spacing: -0.02em; }
.card .more { font-size: 13px; color: var(--soft); }
.panel { padding: 14px 16px; margin: 10px 0; overflow-x: auto; }
.pair { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(440px, 100%), 1fr)); gap: 12px; }
.pair .panel { margin: 0; }
table { border-collapse: collapse; width: 100%; font-size: 14px; }
th, td { text-align: right; padding: 6px 8px; border-bottom: 1px solid var(--line); white-space: nowrap; }
th { font-weight: 600; font-size: 12.5px; color: var(--soft); vertical-align: bottom; }
th:first-child, td:first-child, .left { text-align: left; }
tr:last-child td { border-bottom: none; }
tr.total td { font-weight: 600; border-top: 2px solid var(--line); }
td small { color: var(--soft); font-size: 12.5px; }
td:first-child { white-space: normal; overflow-wrap: anywhere; min-width: 150px; }
.strong { font-weight: 650; }
.role { color: var(--soft); font-size: 12.5px; }
td .under { display: block; margin-left: 17px; }
.key { display: flex; flex-wrap: wrap; gap: 2px 18px; font-size: 13px; margin: 0 0 6px; }
.swatch { display: inline-block; width: 10px; height: 10px; border-radius: 50%; margin-right: 7px;
  background: currentColor; }
details { margin: 8px 0 2px; }
summary { cursor: pointer; font-size: 13px; color: var(--soft); }
details .scroll { max-height: 420px; overflow: auto; margin-top: 6px; }
svg.chart { display: block; width: 100%; min-width: 640px; height: auto; } 
.pair svg.chart { min-width: 300px; }
svg.inline { display: block; min-width: 116px; }
svg text { font-size: 12px; fill: var(--soft); }
svg .label { text-anchor: end; } svg .tick { text-anchor: middle; } svg .name { text-anchor: start; }
svg .grid { stroke: var(--line); stroke-width: 1; } svg .axis { stroke: var(--line); stroke-width: 2; }
svg .band { fill: var(--band); }
svg g line { stroke: currentColor; stroke-width: 2; opacity: 0.75; } svg g circle { fill: currentColor; }
svg g polyline { fill: none; stroke: currentColor; stroke-width: 1.8; stroke-linejoin: round; }
svg g polygon { fill: currentColor; opacity: 0.14; } svg .fill { fill: currentColor; opacity: 0.85; }
.s0 { color: var(--s0); } .s1 { color: var(--s1); } .s2 { color: var(--s2); } .s3 { color: var(--s3); }
.s4 { color: var(--s4); } .s5 { color: var(--s5); } .s6 { color: var(--s6); } .s7 { color: var(--s7); }
.s8 { color: var(--s8); }
.key span, .who { color: var(--ink); }
.problem { white-space: pre-wrap; overflow-wrap: anywhere; margin: 2px 0 10px; font-size: 14px; }
.sides { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(290px, 100%), 1fr)); gap: 12px; }
.side { border: 1px solid var(--line); border-radius: 8px; min-width: 0; }
.side header { padding: 6px 12px; border-bottom: 1px solid var(--line); font-size: 13px; display: flex; gap: 8px;
  align-items: center; flex-wrap: wrap; }
pre { margin: 0; padding: 10px 12px; font: 12px/1.5 ui-monospace, SFMono-Regular, Menlo, Consolas, monospace;
  white-space: pre-wrap; overflow-wrap: anywhere; max-height: 300px; overflow-y: auto; }
.verdict { font-size: 12px; font-weight: 600; color: var(--warn); }
.verdict.correct { color: var(--good); } .verdict.wrong { color: var(--bad); }
@media print { body { background: #fff; } .panel, .card, .side { break-inside: avoid; } pre { max-height: none; } }
"""
