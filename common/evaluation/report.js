const list = document.getElementById("cards");
const order = document.getElementById("order");
const only = document.getElementById("only");
const number = (card, name) => card.dataset[name] === "" ? -Infinity : Number(card.dataset[name]);
const orders = {
  worst: (a, b) => number(b, "badness") - number(a, "badness"),
  error: (a, b) => number(b, "error") - number(a, "error"),
  gain: (a, b) => number(a, "gain") - number(b, "gain"),
  file: (a, b) => number(a, "index") - number(b, "index"),
};
function arrange() {
  [...list.children].sort(orders[order.value]).forEach((card) => {
    card.hidden = only.checked && card.dataset.failed !== "true";
    list.appendChild(card);
  });
  document.getElementById("none").hidden = [...list.children].some((card) => !card.hidden);
}
order.addEventListener("change", arrange);
only.addEventListener("change", arrange);
addEventListener("beforeprint", () => document.querySelectorAll("details:not(.raw)").forEach((d) => { d.open = true; }));
document.getElementById("controls").hidden = false;
