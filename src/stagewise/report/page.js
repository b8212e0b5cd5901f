"use strict";
(() => {
  const tip = document.getElementById("tip");
  const make = (tag, text, parent) => {
    const node = document.createElement(tag);
    if (text !== undefined) node.textContent = text;
    if (parent) parent.append(node);
    return node;
  };
  const place = (x, y) => {
    tip.classList.add("on");
    const left = Math.max(8, Math.min(x, document.documentElement.clientWidth - tip.offsetWidth - 8));
    tip.style.left = `${left + scrollX}px`;
    tip.style.top = `${y + scrollY}px`;
  };
  const hide = () => tip.classList.remove("on");

  // A token's panel: the five most likely tokens of every expert and of the product.
  const panel = (token) => {
    const data = JSON.parse(token.dataset.top);
    tip.replaceChildren();
    make("div", token.dataset.note, tip).style.marginBottom = "6px";
    const columns = make("div", undefined, tip);
    columns.className = "columns";
    data.forEach((column) => {
      const box = make("div", undefined, columns);
      box.style.setProperty("--stage", column.colour);
      make("h3", column.name, box).style.color = column.colour;
      const list = make("ol", undefined, box);
      column.top.forEach(([text, probability]) => {
        const item = make("li", undefined, list);
        make("i", undefined, item).style.width = `${100 * probability}%`;
        const word = make("code", text, item);
        if (text === token.dataset.shown) word.style.fontWeight = "700";
        make("span", `${(100 * probability).toFixed(1)}%`, item);
      });
    });
    const box = token.getBoundingClientRect();
    place(box.left, box.bottom + 8);
  };
  document.querySelectorAll(".token").forEach((token) => {
    token.addEventListener("mouseenter", () => panel(token));
    token.addEventListener("focus", () => panel(token));
    token.addEventListener("mouseleave", hide);
    token.addEventListener("blur", hide);
  });

  // A chart's exact values at the x nearest to the pointer.
  document.querySelectorAll("svg.chart").forEach((svg) => {
    const lines = [...svg.querySelectorAll(".series")].map((g) => ({
      name: g.dataset.name, colour: g.style.color, points: JSON.parse(g.dataset.points),
    }));
    if (!lines.length) return;
    const rule = document.createElementNS("http://www.w3.org/2000/svg", "line");
    rule.setAttribute("stroke", "currentColor");
    rule.setAttribute("opacity", "0.35");
    rule.setAttribute("y1", 14);
    rule.setAttribute("y2", svg.viewBox.baseVal.height - 46);
    rule.style.display = "none";
    svg.append(rule);
    svg.addEventListener("mousemove", (event) => {
      const box = svg.getBoundingClientRect();
      const x = (event.clientX - box.left) * (svg.viewBox.baseVal.width / box.width);
      const nearest = lines.map((line) =>
        line.points.reduce((a, b) => (Math.abs(b[0] - x) < Math.abs(a[0] - x) ? b : a)));
      const at = nearest.reduce((a, b) => (Math.abs(b[0] - x) < Math.abs(a[0] - x) ? b : a));
      tip.replaceChildren();
      make("div", at[2], tip).style.color = "var(--muted)";
      nearest.forEach((point, i) => {
        if (Math.abs(point[0] - at[0]) > 4) return;
        const row = make("div", undefined, tip);
        make("b", `${lines[i].name} `, row).style.color = lines[i].colour;
        make("span", point[3], row);
      });
      rule.setAttribute("x1", at[0]);
      rule.setAttribute("x2", at[0]);
      rule.style.display = "";
      place(event.clientX + 14, event.clientY + 14);
    });
    svg.addEventListener("mouseleave", () => { rule.style.display = "none"; hide(); });
  });
  document.documentElement.dataset.ready = String(document.querySelectorAll(".token").length);
})();
